"""Sources made into documents of tokens, kept on disk, packed into sequences and mixed by weight."""
