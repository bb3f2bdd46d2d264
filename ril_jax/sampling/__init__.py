"""Generation: the KV cache, the jitted prefill and decode programs, and the sampler that schedules them."""
