"""Architectures that people use, against eager.  Every other one: `scripts/test -m slow`."""

import pytest

from tests.zoo import functions, layers, networks, transformers_models
from tests.zoo.case import Case, run_case

# What models of others warn of is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

ALL = [case for room in (transformers_models, networks, layers, functions) for case in room.CASES]
ALWAYS = (
    "BertModel",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "ViTModel",
    "ResNetModel",
    "CLIPModel",
    "MambaForCausalLM",
    "Wav2Vec2Model",
    "diffusion UNet",
    "BiLSTM tagger",
    "graph attention",
)
# Where the interpreter runs the very kernels that eager runs.
BIT_EQUAL = {"BertModel", "GPT2LMHeadModel", "LlamaForCausalLM", "ViTModel", "BiLSTM tagger"}
# Run with other sizes than the example too.
OTHER_SIZES = {
    "BertModel",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTModel",
    "diffusion UNet",
    "BiLSTM tagger",
    "graph attention",
}


@pytest.mark.parametrize("name", ALWAYS)
def test_a_program_gives_what_eager_gives(name):
    (case,) = [one for one in ALL if one.name == name]
    outcome = run_case(case)
    assert outcome.difference <= (0 if name in BIT_EQUAL else 1e-5)
    assert outcome.dynamic or name not in OTHER_SIZES


# What is known not to work, with words of the error.
FAILS = {
    "FractionalMaxPool2d": "not in the operator table",
    "householder": "not in the operator table",
    "CTCLoss": "depends on a tensor's values",
    "cov and corrcoef": "depends on a tensor's values",
    "lstsq": "depends on a tensor's values",
    "LongformerModel": "depends on a tensor's values",
    "LEDForConditionalGeneration": "depends on a tensor's values",
    "JetMoeForCausalLM": "depends on a tensor's values",
    "Siglip2VisionModel": "depends on a tensor's values",
    "gradients": "out of torch",
    "jacobian": "out of torch",
    "lu_solve": "not a tensor",
    "InformerModel": "Attention mask should be",
    "AutoformerModel": "invalid for input of size",
    "NystromformerModel": "broadcast|size of tensor",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [one for one in ALL if one.name not in ALWAYS], ids=lambda one: one.name
)
def test_every_other_one_too(case: Case):
    if case.name not in FAILS:
        run_case(case)
        return
    with pytest.raises(Exception, match=FAILS[case.name]):
        run_case(case)
