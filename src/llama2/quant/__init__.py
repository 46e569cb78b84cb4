"""Weight formats, each its own maths: GGUF blocks in `ggml`."""
