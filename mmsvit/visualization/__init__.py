"""Pictures of super tokens, training curves, and the HTML report."""
