"""Conversations: read, written as the text Gemma 4 reads, and made into tokens with what is learned marked."""
