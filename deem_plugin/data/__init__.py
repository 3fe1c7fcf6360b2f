"""What the models are trained on: conversations with images, collators, procedural scenes."""
