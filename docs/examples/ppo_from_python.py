"""PPO from Python, on responses and scores of one's own: sample, score, advantages, update.

    python docs/examples/ppo_from_python.py

What TRL's `PPOTrainer.step(queries, responses, scores)` did, with the parts of rlhf/ppo.py. Everything in `sample` and
`score` is yours to replace: an environment, a server, recorded dialogues, a compiler, a classifier. Here the tiny base
model of the repository learns to answer briefly, in half a minute on a CPU.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from configs.chat import load_chat_format
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from rlhf.load_roles import load_roles
from rlhf.models import save_policy
from rlhf.rollout import advantages_and_returns, rollout_from
from rlhf.samples import Prompt
from rlhf.tokenizer import load_tokenizer
from rlhf.update import make_optimizer, update

BASE = "rlhf/simulation/base_model"
QUESTIONS = ["What colour is a lemon?", "Name an animal.", "Say hello.", "How many legs has a dog?"]
LONGEST = 24  # tokens

# value_model: policy, as there is no reward model to start it from; a micro-batch has 1024 tokens.
ppo = PPOSettings(value_model="policy", batch_size=32, mini_batch_size=8, ppo_epochs=2, token_budget=1024, kl_coef=0.01,
                  learning_rate=1e-3, value_learning_rate=1e-3)  # fmt: skip

accelerator = Accelerator(cpu=not torch.cuda.is_available())
set_seed(0)
tokenizer = load_tokenizer(BASE)
chat_format = load_chat_format(tokenizer)
roles = load_roles(ppo, ModelSettings(model_name_or_path=BASE), tokenizer, accelerator.device, seed=0)
optimizer = make_optimizer(roles, ppo)


def sample(prompts: list[Prompt]) -> list[list[int]]:
    """The ids of one response a prompt, its stop id included. Any loop will do; here it is transformers' `generate`."""
    responses = []
    with roles.policy.whole() as policy:  # its adapter switched on, its weights in one place
        for prompt in prompts:
            ids = torch.tensor([prompt.ids], device=accelerator.device)
            drawn = policy.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=ppo.temperature, top_k=0,
                top_p=1.0, max_new_tokens=LONGEST, eos_token_id=chat_format.stop_ids,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            responses.append(drawn[0, len(prompt.ids) :].tolist())
    return responses


def score(prompts: list[Prompt], responses: list[list[int]]) -> torch.Tensor:
    """A number for each response, on any scale: short answers are good, answers without an end are not."""
    texts = [chat_format.decode_response(ids) for ids in responses]
    ended = [ids[-1] in chat_format.stop_ids for ids in responses]
    return torch.tensor([-len(text) / 100 - (not end) for text, end in zip(texts, ended, strict=True)])


def main(iterations: int = 6) -> None:
    messages = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(ppo.batch_size)]
    prompts = [Prompt(dialogue, chat_format.encode_prompt(dialogue)) for dialogue in messages]
    skipped = 0  # steps in a row that were not finite
    for iteration in range(iterations):
        responses = sample(prompts)
        scores_B = score(prompts, responses)
        # Log-probs of the policy and of the reference, and values. For recorded responses of an older policy also pass
        # `logprobs`, its log-prob of every token: without, they are taken from the policy as it is now.
        rollout = rollout_from(roles, prompts, responses, scores_B, ppo, accelerator.device)
        advantages_BR, returns_BR = advantages_and_returns(rollout, ppo, accelerator)
        figures, skipped = update(
            roles, optimizer, rollout, advantages_BR, returns_BR, ppo, accelerator, iteration, skipped
        )
        tokens = sum(map(len, responses)) / len(responses)
        print(
            f"iteration {iteration + 1}: score {scores_B.mean():.3f}, tokens {tokens:.1f}, "
            f"KL {rollout.kl_BR.sum(1).mean():.3f} nats, clipped {figures['policy/clip_fraction']:.3f}"
        )
    with roles.policy.acting():
        save_policy(
            roles.policy.model, tokenizer, "runs/ppo-from-python", "Answers briefly: docs/examples/ppo_from_python.py."
        )


if __name__ == "__main__":
    main()
