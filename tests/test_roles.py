"""The five roles on one base: the numbers of separate merged models, in the memory of one."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_ppo import SMALL, roll, some_prompts
from tiny_models import save_tiny_policy, save_tiny_reward_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from reward.model import add_lora, create_reward_model, save_reward_model
from reward.scorer import score_ids
from rlhf.load_roles import load_roles
from rlhf.models import decoder_of, load_policy, save_policy
from rlhf.rollout import collect
from rlhf.sequences import Sequences
from rlhf.tokenizer import load_tokenizer

LINEAR = ["q_proj", "v_proj", "down_proj"]


def shaken(model, seed):
    """LoRA starts as the identity; this makes an adapter that changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and trained on it the SFT policy and both reward models: `x/model` merged, `x/model/adapter` alone."""
    root = tmp_path_factory.mktemp("roles")
    base = save_tiny_policy(root / "base", 0, hidden_size=64, intermediate_size=128)
    tokenizer = load_tokenizer(base)
    sft = shaken(load_policy(ModelSettings(model_name_or_path=base, use_peft=True, lora_r=3)), 1)
    save_policy(sft, tokenizer, root / "sft", "card")
    paths = {"base": base, "sft": str(root / "sft")}
    for seed, name in enumerate(("helpfulness", "safety")):
        model = create_reward_model(base, tokenizer, seed=seed)
        if name == "safety":  # starts from the SFT adapter, in its shape
            model = add_lora(model, 4, 8, 0.0, None, paths["sft"] + "/adapter")
        else:
            model = add_lora(model, 4, 8, 0.0, LINEAR)
        save_reward_model(shaken(model, 2 + seed), tokenizer, root / name, "card")
        paths[name] = str(root / name)
    return paths


def shared(folders, adapters=True, **ppo):
    end = "/adapter" if adapters else ""
    settings = PPOSettings(
        helpfulness_model_path=folders["helpfulness"] + end, safety_model_path=folders["safety"] + end, **(SMALL | ppo)
    )
    model = ModelSettings(model_name_or_path=folders["base"], adapter_path=folders["sft"] + "/adapter", use_peft=True)
    return load_roles(settings, model, load_tokenizer(folders["base"]), "cpu", 0), settings


def separate(folders, **ppo):
    settings = PPOSettings(
        helpfulness_model_path=folders["helpfulness"], safety_model_path=folders["safety"], **(SMALL | ppo)
    )
    return load_roles(settings, ModelSettings(model_name_or_path=folders["sft"]), tiny_tokenizer(), "cpu", 0), settings


@pytest.mark.parametrize("value_model", ["helpfulness", "policy", "trunk", "path"])
def test_adapters_on_one_base_are_the_merged_separate_models(folders, value_model):
    path = {"value_model_path": folders["safety"]} if value_model == "path" else {}
    adapter = {"value_model_path": folders["safety"] + "/adapter"} if value_model == "path" else {}
    one, settings = shared(folders, value_model=value_model, **adapter)
    five, _ = separate(folders, value_model=value_model, **path)
    ours, theirs = roll(one, settings), roll(five, settings)
    assert ours.responses == theirs.responses
    for name in ("logprobs_BR", "reference_logprobs_BR", "values_BR", "raw"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-5, rtol=1e-4)
    assert ours.raw["helpfulness"].std() > 0.01
    assert float(ours.values_BR.abs().max()) == 0 if value_model in ("policy", "trunk") else ours.values_BR.std() > 0.01


def test_the_base_exists_once(folders):
    one, _ = shared(folders)
    everyone = (one.policy, one.reference, one.value, *one.reward_models.values())
    weights = {p.data_ptr(): p.numel() for role in everyone for p in role.model.parameters()}
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders["base"]).parameters())
    trained = sum(p.numel() for own in one.trained.values() for p in own.values())
    adapters = sum(p.numel() for name, p in one.policy.model.named_parameters() if "lora_" in name)
    assert sum(weights.values()) == base + adapters + 3 * 64  # three scalar heads
    assert 0 < trained < adapters
    assert not any(p.requires_grad for name, p in one.policy.model.named_parameters() if "lora_" not in name)


def test_each_role_trains_its_own_weights_whichever_acted_last(folders):
    one, settings = shared(folders)
    sequences = Sequences.build([p.ids for p in some_prompts(4)], [[7, 8, 2], [9], [11, 12], [5]], "cpu")
    with one.reward_models["safety"].acting():  # the last to act before
        pass
    with one.policy.acting():
        one.policy_logprobs(sequences, range(4))[0].sum().backward()
    assert all(p.grad is not None for p in one.policy.trained.values())
    assert all(p.grad is None for p in one.value.trained.values())
    with one.value.acting():
        one.values(sequences, range(4)).sum().backward()
    assert all(p.grad is not None for p in one.value.trained.values())
    names = {name for name, p in one.policy.model.named_parameters() if p.grad is not None}
    assert all(".default." in name or ".value." in name for name in names)


def test_a_trained_policy_leaves_reference_and_reward_models_where_they_are(folders):
    one, settings = shared(folders)
    before = roll(one, settings)
    with torch.no_grad():
        for p in one.policy.trained.values():
            p.add_(0.05)
    sequences = before.sequences
    rows = range(len(sequences.ids))
    torch.testing.assert_close(
        sequences.scatter([(rows, one.reference_logprobs(sequences, rows))]), before.reference_logprobs_BR
    )
    torch.testing.assert_close(one.scores("safety", sequences.ids, 1000), before.raw["safety"])
    moved = sequences.scatter([(rows, one.policy_logprobs(sequences, rows)[0].detach())])
    assert (moved - before.logprobs_BR).abs().max() > 0.01


def test_a_value_model_from_a_policy_of_all_weights_has_its_merged_adapter(folders):
    settings = PPOSettings(helpfulness_model_path=folders["helpfulness"], safety_model_path=folders["safety"],
                           value_model="policy", **SMALL)  # fmt: skip
    model = ModelSettings(model_name_or_path=folders["base"], adapter_path=folders["sft"] + "/adapter")
    roles = load_roles(settings, model, load_tokenizer(folders["base"]), "cpu", 0)
    policy, value = (decoder_of(role.model).state_dict() for role in (roles.policy, roles.value))
    assert policy.keys() == value.keys()
    assert all(torch.equal(policy[name], value[name]) for name in policy)
    assert not {p.data_ptr() for p in roles.policy.model.parameters()} & {
        p.data_ptr() for p in roles.value.model.parameters()
    }


def test_an_adapter_leaves_the_embeddings_of_the_base_alone(folders, tmp_path):
    base = save_tiny_policy(tmp_path / "base", 0, pad=False, hidden_size=64, intermediate_size=128)
    tokenizer = load_tokenizer(base)  # with a padding token, for which the embeddings grow
    reward = add_lora(create_reward_model(base, tokenizer), 4, 8, 0.0, LINEAR)
    save_reward_model(reward, tokenizer, tmp_path / "reward", "card")
    adapter = tmp_path / "reward" / "adapter"
    settings = PPOSettings(helpfulness_model_path=str(adapter), safety_model_path=str(adapter), **SMALL)
    model = ModelSettings(model_name_or_path=base, use_peft=True)
    policy = load_roles(settings, model, tokenizer, "cpu", 0).policy.model
    expected = load_policy(ModelSettings(model_name_or_path=base)).get_input_embeddings().weight
    assert torch.equal(policy.get_input_embeddings().weight, expected)
    written = json.loads((adapter / "adapter_config.json").read_text())
    for change in ({"modules_to_save": ["embed_tokens"]}, {"bias": "lora_only"}):
        (adapter / "adapter_config.json").write_text(json.dumps(written | change))
        with pytest.raises(UserError, match="changes weights of the base too"):
            load_roles(settings, model, tokenizer, "cpu", 0)


def test_an_adapter_of_embeddings_is_trained(folders):
    settings = PPOSettings(
        helpfulness_model_path=folders["helpfulness"] + "/adapter", safety_model_path=folders["safety"] + "/adapter",
        **SMALL,
    )  # fmt: skip
    model = ModelSettings(model_name_or_path=folders["base"], use_peft=True,
                          lora_target_modules=["q_proj", "embed_tokens"])  # fmt: skip
    policy = load_roles(settings, model, load_tokenizer(folders["base"]), "cpu", 0).policy
    names = {name for name, _ in policy.model.named_parameters() if "lora_" in name and ".default" in name}
    assert policy.trained.keys() == names
    assert any("lora_embedding_A" in name for name in names)
    assert all(p.requires_grad for p in policy.trained.values())


def test_an_adapter_trained_with_dropout_computes_without(folders, tmp_path):
    config = LoraConfig(r=3, lora_dropout=0.5, target_modules=LINEAR, task_type="CAUSAL_LM")
    trained = shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(folders["base"]), config), 7)
    trained.save_pretrained(tmp_path / "adapter")
    one, _ = shared(folders | {"sft": str(tmp_path)}, gradient_checkpointing=True)
    sequences = Sequences.build([p.ids for p in some_prompts(2)], [[7, 8, 2], [9]], "cpu")
    rows = range(2)
    expected = one.reference_logprobs(sequences, rows)
    assert one.policy.model.training
    assert torch.equal(one.policy_logprobs(sequences, rows)[0].detach(), expected)


def test_dropout_of_an_adapter_that_is_trained_further_is_that_of_the_settings(folders):
    settings = ModelSettings(model_name_or_path=folders["base"], adapter_path=folders["sft"] + "/adapter",
                             use_peft=True, lora_dropout=0.25)  # fmt: skip
    rates = {m.p for name, m in load_policy(settings).named_modules() if "lora_dropout.default" in name}
    assert rates == {0.25}


def test_a_policy_with_fewer_adapted_layers_than_the_reward_models_is_saved(folders, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained = shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(folders["base"]), config), 7)
    trained.save_pretrained(tmp_path / "adapter")
    one, _ = shared(folders | {"sft": str(tmp_path)})
    with one.policy.acting():
        save_policy(one.policy.model, load_tokenizer(folders["base"]), tmp_path / "model", "card")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in trained.merge_and_unload().state_dict().items():
        torch.testing.assert_close(saved[name], weight)


def test_the_saved_policy_is_the_one_that_acted(folders, tmp_path):
    one, settings = shared(folders)
    with torch.no_grad():
        for p in one.policy.trained.values():
            p.add_(0.01)
    tokenizer = load_tokenizer(folders["base"])
    with one.policy.acting():
        save_policy(one.policy.model, tokenizer, tmp_path / "model", "card")
    assert sorted(p.name for p in (tmp_path / "model" / "adapter").glob("*.safetensors")) == [
        "adapter_model.safetensors"
    ]
    again = ModelSettings(
        model_name_or_path=folders["base"], adapter_path=str(tmp_path / "model/adapter"), use_peft=True
    )
    ids = torch.tensor([some_prompts(1)[0].ids])
    with torch.no_grad():
        expected = one.policy.model(ids).logits
        for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "model"), load_policy(again)):
            torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_responses_to_one_prompt_share_its_computation_and_nothing_changes(folders, lora):
    roles, settings = (shared if lora else separate)(folders, responses_per_prompt=4)
    prompts = [p.ids for p in some_prompts(3)]
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randint(4, 200, (1 + i % 5,), generator=generator).tolist() for i in range(12)]
    responses[1] = [*responses[0], 7]  # one begins like another
    results = []
    for trees in (False, True):
        sequences = Sequences.build(prompts_of_each(prompts, 4), responses, "cpu", 4, trees)
        batches = sequences.micro_batches([3, 1, 0, 2, 9, 8, 6], 10_000)
        assert sorted(row for batch in batches for row in batch) == [0, 1, 2, 3, 6, 8, 9]
        for p in roles.policy.trained.values():
            p.grad = None
        parts = []
        with roles.policy.acting():
            for rows in batches:
                logprobs_N, entropy_N = roles.policy_logprobs(sequences, rows, entropy=True)
                assert len(logprobs_N) == sum(len(responses[row]) for row in rows)
                weights_N = sequences.flat(torch.arange(12.0)[:, None].expand(sequences.response_mask_BR.shape), rows)
                (logprobs_N * weights_N).sum().backward()
                parts.append((rows, logprobs_N.detach()))
        gradient = torch.cat([p.grad.flatten() for p in roles.policy.trained.values()])
        results.append((sequences.scatter(parts), gradient))
    (logprobs, gradient), (of_trees, gradient_of_trees) = results
    torch.testing.assert_close(logprobs, of_trees, atol=1e-4, rtol=1e-4)
    largest = float(gradient.abs().max())
    assert largest > 0.1
    torch.testing.assert_close(gradient, gradient_of_trees, atol=1e-5 * largest, rtol=1e-4)


def prompts_of_each(prompts, k):
    return [ids for ids in prompts for _ in range(k)]


def test_a_rollout_of_several_responses_a_prompt(folders):
    roles, settings = shared(folders, responses_per_prompt=2)
    rollout = collect(roles, some_prompts(4), settings, load_chat_format(tiny_tokenizer()), 3, range(8), "cpu", k=2)
    assert len(rollout.prompts) == len(rollout.responses) == 8
    assert rollout.prompts[0] is rollout.prompts[1]
    assert rollout.sequences.trees
    with roles.reward_models["safety"].acting():
        singly = score_ids(roles.reward_models["safety"].model, rollout.sequences.ids[:1])
    assert rollout.raw["safety"][0].item() == pytest.approx(singly.item(), abs=1e-4)


def test_user_mistakes(folders, tmp_path):
    other = save_tiny_policy(tmp_path / "other", 5, hidden_size=64, intermediate_size=128)
    tokenizer = load_tokenizer(folders["base"])
    _, settings = shared(folders)
    base = ModelSettings(model_name_or_path=folders["base"], use_peft=True)
    with pytest.raises(UserError, match="was made for .* the model here is"):
        load_roles(settings, replace(base, model_name_or_path=other), tokenizer, "cpu", 0)
    with pytest.raises(UserError, match="helpfulness_model_path: .* has no scalar head"):
        load_roles(replace(settings, helpfulness_model_path=folders["sft"] + "/adapter"), base, tokenizer, "cpu", 0)
    with pytest.raises(UserError, match="is an adapter; pass the merged model"):
        load_roles(settings, replace(base, use_peft=False), tokenizer, "cpu", 0)
    with pytest.raises(UserError, match="adapter_path: no LoRA adapter at"):
        load_policy(replace(base, adapter_path=str(tmp_path / "none")))
    with pytest.raises(UserError, match="lora_r: adapter_path names an adapter with its own"):
        replace(base, adapter_path="x", lora_r=5)
    with pytest.raises(UserError, match="go together"):
        PPOSettings(value_model="path")
    with pytest.raises(UserError, match="does not divide mini_batch_size"):
        PPOSettings(responses_per_prompt=3)
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(other), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    plain.save_pretrained(tmp_path / "foreign")
    with pytest.raises(UserError, match="made for"):
        load_policy(replace(base, adapter_path=str(tmp_path / "foreign")))


def test_reward_models_that_are_merged_keep_their_value_adapter_beside_them(folders):
    one, settings = shared(folders, adapters=False)
    assert one.value.adapters is one.reward_models["helpfulness"].adapters
    ours, theirs = roll(one, settings), roll(separate(folders)[0], settings)
    for name in ("values_BR", "raw"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        for p in one.value.trained.values():
            p.add_(0.05)
    torch.testing.assert_close(one.scores("helpfulness", ours.sequences.ids, 1000), theirs.raw["helpfulness"])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version in accelerate's configuration must be 2"),
        ({"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "cpu_ram_efficient_loading .* must be false"),
    ],
)
def test_a_launch_that_would_leave_weights_empty_or_whole_is_refused(folders, monkeypatch, environment, message):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        shared(folders)


def test_reward_model_of_another_tokenizer_is_refused(folders, tmp_path):
    path = save_tiny_reward_model(tmp_path / "rm", 0)
    tokenizer = load_tokenizer(path)
    tokenizer.add_tokens(["one more", "and another"])
    tokenizer.save_pretrained(path)
    _, settings = shared(folders)
    base = ModelSettings(model_name_or_path=folders["base"], use_peft=True)
    with pytest.raises(UserError, match="another tokenizer"):
        load_roles(replace(settings, safety_model_path=path), base, load_tokenizer(folders["base"]), "cpu", 0)
