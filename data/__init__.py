"""Files made into batches: a folder for each of corpora, conversations and media; tokenizer and loading beside them."""
