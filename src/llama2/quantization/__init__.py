"""Weight formats, each its own maths: GGUF blocks in `ggml`, their sizes without torch in `blocks`."""
