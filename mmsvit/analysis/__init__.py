"""Parameters and FLOPs of models and configs."""
