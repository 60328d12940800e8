"""Context parallel."""
