"""Steps from a model's logits to the distribution that is decoded, beyond those of `Sampling`."""
