"""Write an output whole or not at all."""
