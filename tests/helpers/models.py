"""Models for tests."""

from transformers import LlamaConfig, LlamaForCausalLM

from dualtrain.model.exported import exported_config
from dualtrain.network.transformer import DualLM


def to_llama(model: DualLM) -> LlamaForCausalLM:
    """The Llama that a model with the linear head is exported as, with copies of its weights."""
    values = exported_config(model.config, target="next", append_eos=True, dtype="float32")
    llama = LlamaForCausalLM(LlamaConfig.from_dict(values))
    llama.load_state_dict(model.state_dict())
    return llama.train(model.training)
