"""Float-exact rewrites of a model before it is quantised."""
