"""YAML only: what a run is made of."""
