"""Commented specs to start from: what `tip-ray init` writes."""

from __future__ import annotations

QUICKSTART = """\
# The quickstart: a student that drops the carry when it adds learns, on its own rollouts, from a
# teacher that does not. Runs on two CPU cores in about two minutes, with nothing to download:
#
#   tip-ray run job_specs/quickstart.yaml
#   tip-ray run job_specs/quickstart.yaml --set selection.rule=random       # the control
#   tip-ray run job_specs/quickstart.yaml --set selection.rule=all          # no selection
#
# Fields that are left out have their defaults; `tip-ray validate` shows what differs from them,
# `tip-ray schema` all of them.

name: carry-quickstart          # prefix of the run id
seed: 0
steps: 40
max_lag: 1                      # rollouts may be one step behind the learner; 0: strictly on-policy

# A Hugging Face checkpoint: a path, a hub id or any fsspec URL. These two ship with the package.
student: {model: "demo:carry-student"}
teacher: {model: "demo:carry-teacher"}

# Problems: a JSON-lines or Parquet file at any fsspec URL. These are generated.
prompts:
  source: "demo:carry"
  prompts_per_step: 32          # each is answered samples_per_prompt times

rollout:
  engine: vllm
  samples_per_prompt: 4
  max_prompt_tokens: 16
  max_response_tokens: 48
  temperature: 1.0

# Both models are compared at the student's 16 most probable tokens; what is left is one bucket.
support: {k: 16}

# Which response tokens the learner gets to see: here the half that scores best by the student's
# entropy or its divergence from the teacher. The others never leave the teacher's node.
selection:
  rule: soft_or                 # all | random | entropy | divergence | q3 | prefix ...
  retention: 0.5                # fraction of each rollout's tokens

loss: {kind: reverse_kl, normalize: token}

learner:
  replicas: 1                   # FSDP2 ranks
  lr: 3.0e-4
  schedule: cosine

checkpoint: {every_steps: 10}

# Greedy accuracy on problems that are not trained on: before the first step, every ten, at the end.
evaluation:
  - {name: carry, source: "demo:carry-eval", every_steps: 10, limit: 256, scorer: exact}
"""

GSM8K = """\
# Grade-school problems: a small instruction model learns from a larger one of its family.
# Needs the hub, or local copies of both models and the data. CPUs suffice, slowly; for GPUs set
# num_gpus of the three pools and raise prompts_per_step.

name: gsm8k
steps: 100
max_lag: 1

student: {model: HuggingFaceTB/SmolLM2-135M-Instruct}
teacher: {model: HuggingFaceTB/SmolLM2-360M-Instruct, max_batch_tokens: 4096}

prompts:
  source: "hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet"
  field: question
  answer_field: answer
  prompts_per_step: 16
  chat: {system: "Solve the problem step by step. End with the number alone."}

rollout:
  engine: vllm
  num_gpus: 0
  samples_per_prompt: 2
  max_prompt_tokens: 320        # longer ones are skipped and counted
  max_response_tokens: 256

support: {k: 32}

selection: {rule: soft_or, retention: 0.5}

learner:
  replicas: 1
  num_gpus: 0
  micro_batch_tokens: 4096
  lr: 1.0e-5
  warmup_steps: 5

checkpoint: {every_steps: 20}

evaluation:
  - name: gsm8k
    source: "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet"
    every_steps: 50
    limit: 200
    max_response_tokens: 256
    scorer: last_number         # the last number of the response against that of the answer
"""

MATH = """\
# Competition mathematics on GPUs: a Qwen3-8B teacher, a Qwen3-4B student, long responses, half of
# the tokens kept. Seven GPUs as it stands; put your own training file into prompts.source.

name: math-8b-to-4b
run_root: "s3://my-bucket/runs" # any fsspec URL that every node can reach
steps: 200
max_lag: 0                      # strictly on-policy

student: {model: Qwen/Qwen3-4B}
teacher:
  model: Qwen/Qwen3-8B
  num_gpus: 1                   # a replica; above 1 the model is spread over them
  max_batch_tokens: 32768
  chunk_rows: 2048

prompts:
  source: "s3://my-bucket/math/train.jsonl"   # rows {"problem": ..., "answer": ...}
  prompts_per_step: 8
  chat: {template_kwargs: {enable_thinking: false}}

rollout:
  engine: vllm
  replicas: 2
  num_gpus: 1
  samples_per_prompt: 16
  max_prompt_tokens: 2048
  max_response_tokens: 8192
  temperature: 1.0

support: {k: 64}

selection: {rule: soft_or, retention: 0.5}

loss: {kind: reverse_kl, normalize: rollout}

learner:
  replicas: 4                   # FSDP2 ranks
  num_gpus: 1
  micro_batch_tokens: 16384
  gradient_checkpointing: true
  lr: 1.0e-6
  schedule: cosine

checkpoint: {every_steps: 20, keep: 3}

evaluation:
  - name: math-500
    source: "hf://datasets/HuggingFaceH4/MATH-500/test.jsonl"
    every_steps: 50
    samples: 4
    temperature: 1.0
    max_response_tokens: 8192
    scorer: last_number         # right for numbers; an answer that is none counts as wrong
"""

TEMPLATES = {"quickstart": QUICKSTART, "gsm8k": GSM8K, "math": MATH}
