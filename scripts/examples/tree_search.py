"""Best-of-n tree search: now and then the worst branch makes room for a fork of the best, and another tries again."""

from miniinfer_jax import LLM, RequestOutput, SamplingParams

WIDTH, PIECE, NUM_ROUNDS = 4, 8, 4  # branches; tokens between two decisions; decisions


def score(branch: RequestOutput) -> float:
    """The mean log-probability of a branch's tokens."""
    completion = branch.outputs[0]
    return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))


engine = LLM("demo", max_num_seqs=8, max_num_batched_tokens=64).engine
prompt = "Once upon a time"
params = SamplingParams(temperature=1.0, seed=0, max_tokens=2 * PIECE * NUM_ROUNDS, logprobs=0, ignore_eos=True)
engine.add_request("branch-0", engine.tokenizer.encode(prompt), params, prompt)
for number in range(1, WIDTH):
    engine.fork("branch-0", f"branch-{number}", seed=number)

for round in range(1, NUM_ROUNDS + 1):
    while min(len(branch.outputs[0].token_ids) for branch in engine.outputs()) < PIECE * round:
        engine.step()
    best, *others, second_worst, worst = sorted(engine.outputs(), key=score, reverse=True)
    print(f"round {round}: best {score(best):.3f}, worst {score(worst):.3f}: {best.outputs[0].text!r}")
    engine.abort(worst.request_id)
    engine.fork(best.request_id, f"{best.request_id}-{round}", seed=10 * round)  # shares all of its pages
    engine.rewind(second_worst.request_id, PIECE, seed=20 * round)  # its beginning was good enough to come this far

best = max(engine.outputs(), key=score)
print(f"{best.request_id} ({score(best):.3f}): {prompt}{best.outputs[0].text}")
for branch in engine.outputs():
    engine.abort(branch.request_id)
