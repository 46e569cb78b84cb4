"""From logits to text: settings, processors, sampling, search, streaming."""
