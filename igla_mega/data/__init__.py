"""Data that a run reads: tokenizer, indexed datasets, blending, windows, packing, micro-batches."""
