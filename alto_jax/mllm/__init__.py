"""The multimodal language model: vision tower, language model, generation, text and mask tokens."""
