"""Text into batches: sources, tokenizer, memory-mapped shards, packing, loading."""
