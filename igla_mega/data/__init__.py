"""Text to tokens to batches: tokenizer, indexed datasets, blending, windows. Only `batches` imports torch."""
