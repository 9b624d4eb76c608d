"""Sentence encoders of the BERT family: the forward pass, folders, weights, text to token ids."""
