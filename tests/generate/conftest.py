"""A small random model whose context matters, a tokenizer, and both as an exported model."""

import pytest
import torch
from helpers.models import save_model
from helpers.texts import CONTEXT, SPECIAL, WORDS, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dualtrain.common.vocabulary import Vocabulary
from dualtrain.model.handle import ModelHandle


@pytest.fixture(scope="session")
def network():
    return random_model()


@pytest.fixture(scope="session")
def model(network) -> ModelHandle:
    vocabulary = Vocabulary(
        size=WORDS, special_ids=SPECIAL, bos_id=1, eos_id=2, mask=4, stop_ids=(1, 2)
    )
    return ModelHandle(model=network, vocabulary=vocabulary, context=CONTEXT)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE: tokens carry the space before their word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The cat sat on the mat. " * 20], trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="session")
def exported(tokenizer, tmp_path_factory):
    """The directory of an exported model with the tokenizer's vocabulary."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    # Two ids of padding, as for speed.
    network = random_model(tokenizer.get_vocab_size() + 2)
    # Texts that end of themselves would make the tests depend on where.
    with torch.no_grad():
        network.lm_head.bias[:5] = -30.0
    save_model(network, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
