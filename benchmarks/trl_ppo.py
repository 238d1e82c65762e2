"""The peer's side of `benchmarks.rlhf_speed`: TRL's experimental PPOTrainer.

``PEER_PYTHON trl_ppo.py DIRECTORY`` reads the settings, the prompts and the weights from the
directory, and writes result.json. It needs trl (1.12.0 was used), transformers and torch.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo.ppo_trainer import batch_generation, forward
from trl.experimental.utils import get_reward
from trl.trainer.utils import selective_log_softmax


class Clock(TrainerCallback):
    """The time and the CPU time at the end of each iteration."""

    def __init__(self):
        self.stamps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.stamps.append((time.perf_counter(), time.process_time()))


def main(directory):
    settings = json.loads((directory / "settings.json").read_text())
    if settings["peer_threads"] is not None:
        torch.set_num_threads(settings["peer_threads"])
    policy, reference, reward, value = make_models(settings, np.load(directory / "weights.npz"))
    clock = Clock()
    trainer = make_trainer(settings, directory, (policy, reference, reward, value), clock)
    new_tokens = record_new_tokens(policy)
    pad = settings["vocab_size"]
    result = same_model_checks(settings, policy, reward, pad)

    queries = left_padded(settings["prompts"][: settings["num_texts"]], pad)
    sampling = {"max_new_tokens": settings["new_tokens"], "do_sample": True, "top_k": 0.0}
    sampling = GenerationConfig(**sampling, top_p=1.0, temperature=1.0)
    inputs = {"input_ids": queries.masked_fill(queries == pad, 0), "attention_mask": queries != pad}

    def rollout():
        """Texts, their log-probabilities and their values, as the trainer collects them."""
        texts, logits = batch_generation(policy, queries, len(queries), pad, sampling)
        selective_log_softmax(logits, texts[:, queries.shape[1] :])
        get_reward(value, texts, pad, queries.shape[1])

    policy.eval()
    repeats = settings["repeats"]
    with torch.no_grad():
        generation = timed(lambda: policy.generate(**inputs, generation_config=sampling), repeats)
        rollouts = timed(rollout, repeats)
    new_tokens.clear()
    trainer.train()
    stamps = np.asarray(clock.stamps)
    steps = {int(x["step"]) for x in trainer.optimizer.state.values()}
    assert len(steps) == 1, "every parameter takes every step"
    result |= {
        "times": {
            "generation": generation,
            "rollout": rollouts,
            "iteration": np.diff(stamps, axis=0).tolist(),  # without the first
        },
        "new_tokens": sum(new_tokens) / len(stamps),  # in an iteration
        "gradient_steps": steps.pop() / len(stamps),
        "software": f"TRL {trl.__version__}, transformers {transformers.__version__}, "
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
    }
    (directory / "result.json").write_text(json.dumps(result))


def make_models(settings, weights):
    """Policy, reference, reward model and value model, in float32."""
    sizes = LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["width"],
        intermediate_size=settings["mlp_width"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=settings["num_heads"],
        num_key_value_heads=settings["num_kv_heads"],
        max_position_embeddings=settings["longest"] + settings["new_tokens"],
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        num_labels=1,
    )
    kinds = [
        (LlamaForCausalLM, "policy"),
        (LlamaForCausalLM, "policy"),
        (LlamaForSequenceClassification, "reward"),
        (LlamaForSequenceClassification, "reward"),
    ]
    loaded = []
    for kind, prefix in kinds:
        model = kind(sizes)
        named = {
            name.removeprefix(f"{prefix}.").removeprefix("model."): torch.from_numpy(weights[name])
            for name in weights
            if name.startswith(f"{prefix}.")
        }
        if prefix == "reward":
            model.score.load_state_dict({"weight": named.pop("score.weight")})
        model.model.load_state_dict(named)
        loaded.append(model)
    return loaded


def make_trainer(settings, directory, models, clock):
    """A trainer with the same numbers of texts, minibatches and gradient steps as ours."""
    policy, reference, reward, value = models
    options = PPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        # One accumulation step: with several, the optimiser would step once for all of them, and
        # not once for each minibatch.
        per_device_train_batch_size=settings["num_texts"],
        gradient_accumulation_steps=1,
        num_mini_batches=settings["minibatches"],
        local_rollout_forward_batch_size=settings["num_texts"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=settings["num_texts"] * (settings["iterations"] + 1),
        response_length=settings["new_tokens"],
        stop_token=None,  # so all texts have full length
        missing_eos_penalty=None,
        temperature=1.0,
        kl_coef=settings["ref_kl_coef"],
        kl_estimator="k1",
        whiten_rewards=False,
        gamma=1.0,
        lam=settings["gae_lambda"],
        cliprange=settings["clip_eps"],
        cliprange_value=settings["clip_eps"],
        vf_coef=settings["vf_coef"],
        learning_rate=settings["lr"],
        adam_epsilon=settings["adam_eps"],
        weight_decay=0.0,
    )
    return PPOTrainer(
        args=options,
        processing_class=make_tokenizer(settings["vocab_size"]),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=[{"input_ids": prompt} for prompt in settings["prompts"]],
        callbacks=[clock],
    )


def make_tokenizer(vocab_size):
    """Words <0>, <1>, …; the padding is a token that the model does not have."""
    words = {f"<{i}>": i for i in range(vocab_size + 1)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")),
        eos_token=f"<{vocab_size - 1}>",
        pad_token=f"<{vocab_size}>",
        padding_side="left",
    )


def record_new_tokens(policy):
    """A list to which every call of ``policy.generate`` appends its number of new tokens."""
    counts = []
    generate = policy.generate

    def recorded(*args, **kwargs):
        output = generate(*args, **kwargs)
        tokens = getattr(output, "sequences", output)
        counts.append((tokens.shape[1] - kwargs["input_ids"].shape[1]) * len(tokens))
        return output

    policy.generate = recorded
    return counts


def same_model_checks(settings, policy, reward, pad):
    """The log-probabilities and scores of the first prompts, which must equal ours."""
    texts = left_padded(settings["prompts"][: settings["checked_texts"]], pad)
    with torch.no_grad():
        logits = forward(policy, texts, pad).logits[:, :-1]
        is_token = (texts[:, :-1] != pad) & (texts[:, 1:] != pad)
        following = texts[:, 1:].masked_fill(~is_token, 0)
        log_prob = (selective_log_softmax(logits, following) * is_token).sum(1)
        _, score, _ = get_reward(reward, texts, pad, texts.shape[1] - 1)
    return {"log_prob": log_prob.tolist(), "score": score.tolist()}


def left_padded(prompts, pad):
    rows = [torch.tensor(prompt) for prompt in prompts]
    return pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")


def timed(function, repeats):
    """Pairs (seconds, CPU seconds) of ``repeats`` calls after a first one."""
    stamps = []
    for _ in range(repeats + 1):
        function()
        stamps.append((time.perf_counter(), time.process_time()))
    return np.diff(np.asarray(stamps), axis=0).tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
