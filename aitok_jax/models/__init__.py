"""Flax modules. Dtype policy: `dtype` computes, `param_dtype` stores; softmax, cosine attention, LayerNorm, code
distances and everything after the logits are float32 whatever `dtype` is."""
