"""A model on single images, and the demo page."""
