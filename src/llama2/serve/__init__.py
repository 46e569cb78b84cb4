"""The server: `app` and its life, three dialects over one request type.

body        bytes -> a checked model of a dialect, or a refusal that names the field
openai, completions, embeddings, tgi, sagemaker    dialects: a body becomes a `GenerationRequest`, events a reply
served_model    one model: engine, tokenizer, bounds, names
request     what is to be generated, checked once for all dialects
session     one client's requests in the engine: events in, cancelled when the client goes
service     what the routes share: engine, tokenizer, bounds, life, metrics
"""
