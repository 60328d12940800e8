"""Lays a model over a mesh of processes: one file per plan, `apply` orders them."""
