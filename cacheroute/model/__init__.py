"""What a model file is: its header, its experts, where models come from. Knows no routing and loads nothing."""
