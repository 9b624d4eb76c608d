"""The sentence encoder itself: its forward pass, its weights, and text to token ids."""
