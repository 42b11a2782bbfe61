"""Small passes over a lowered graph, one a file; a target lists those that it wants.

Each is a function ``name(model: ir.Model) -> bool`` that changes the model in place and says whether it did. It keeps
what the graph computes, states its rule in its docstring, and does nothing the second time.
"""
