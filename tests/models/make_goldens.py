"""Asks transformers (torch, CPU) what the models of parity_cases answer; as a script, writes goldens/*.npz.

python tests/models/make_goldens.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from parity_cases import (
    CASES,
    GOLDEN_CASES,
    GOLDENS,
    NUM_GREEDY,
    SHORT_PROMPT,
    SIZES,
    Case,
    Expected,
    random_weights,
    save_expected,
)

CLASSES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
SMALLEST_GAP = 2e-3  # between the two likeliest tokens; ten times what logits may differ by
FEWEST_TOKENS = 8  # different ones in a continuation; a loop of two would prove little
MAX_ROWS = 128
torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other


def ask_transformers(case: Case, folder: Path) -> Expected:
    """Saves the case's model in `folder` by save_pretrained and returns what it answers."""
    config_class, model_class = CLASSES[case.family]
    model = model_class._from_config(config_class(**SIZES | case.changes), attn_implementation="eager").eval()
    parameters = dict(model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    for name, values in random_weights(shapes, case.seed).items():
        parameters[name].data = torch.from_numpy(values)
    model.tie_weights()
    model.save_pretrained(folder)

    tokens = np.random.RandomState(case.seed).randint(0, model.config.vocab_size, case.prompt_len)
    rows = np.unique(np.linspace(0, case.prompt_len - 1, MAX_ROWS).astype(int))
    logits = forward(model, tokens)
    logprobs = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    greedy = [continue_greedily(model, prompt) for prompt in (tokens, tokens[:SHORT_PROMPT])]
    half_errors = {}
    for dtype in ("bfloat16", "float16"):
        # Loaded anew: model.to(dtype) would round the frequencies of the rotary embedding too.
        half = model_class.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
        errors = np.abs(forward(half, tokens) - logits)[rows]
        half_errors[dtype] = [float(errors.max()), float(errors.mean())]
    return Expected(
        hf_config=json.loads((folder / "config.json").read_text()),
        weight_shapes=shapes,
        seed=case.seed,
        tokens=tokens,
        rows=rows,
        logits=logits[rows],
        prompt_logprobs=logprobs[np.arange(len(tokens) - 1), tokens[1:]].astype(np.float32),
        greedy_ids=np.stack([ids for ids, _ in greedy]),
        greedy_logprobs=np.stack([values for _, values in greedy]),
        half_errors=half_errors,
    )


@torch.no_grad()
def forward(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] float32."""
    return model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()


@torch.no_grad()
def continue_greedily(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The NUM_GREEDY likeliest next tokens and their log-probabilities, by transformers' own generate()."""
    output = model.generate(
        torch.from_numpy(prompt)[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_GREEDY,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(output.logits).double()  # [NUM_GREEDY, V]
    best = torch.topk(logits, 2).values
    gap = float((best[:, 0] - best[:, 1]).min())
    assert gap > SMALLEST_GAP, f"the two likeliest tokens are only {gap:.1e} apart: give the case another seed"
    ids = output.sequences[0, len(prompt) :]
    num_different = len(set(ids.tolist()))
    assert num_different >= FEWEST_TOKENS, f"only {num_different} different tokens: give the case another seed"
    return ids.numpy(), torch.log_softmax(logits, dim=-1)[torch.arange(NUM_GREEDY), ids].float().numpy()


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for name in GOLDEN_CASES:
        with TemporaryDirectory() as folder:
            path = GOLDENS / f"{name}.npz"
            save_expected(path, ask_transformers(CASES[name], Path(folder)))
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
