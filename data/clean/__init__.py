"""Texts filtered and without duplicates, before they are prepared; through the library `datatrove`, if it is there."""
