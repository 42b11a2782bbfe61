"""Serving with Triton Inference Server: the model repository, its configuration and what checks them offline."""
