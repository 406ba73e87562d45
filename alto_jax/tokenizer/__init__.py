"""The mask tokenizer: mask → 32 latents → codes → mask, with image features and adaptive length."""
