"""The server: `app` and its life, one row for each dialect over one request type.

validation  bytes -> a checked model of a dialect, or a refusal that names the field
dialect     what an API is: routes, errors, stream writers; endpoint and envelope surround every route alike
openai_*, embeddings, models, tgi, sagemaker, state    dialects: a body becomes a `GenerationRequest`, events a reply
served_model    one model: engine, tokenizer, bounds, names
request     what is to be generated, checked once for all dialects
session     one client's requests in the engine: events in, cancelled when the client goes
service     what the routes share: engine, tokenizer, bounds, life, metrics
"""
