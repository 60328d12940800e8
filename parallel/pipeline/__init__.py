"""Pipeline parallel."""
