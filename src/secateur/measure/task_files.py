"""Tasks as files for EleutherAI's lm-evaluation-harness: a YAML that names the task, and its questions beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from secateur.core.errors import OutputError
from secateur.measure.tasks import END, How, LanguageTask

PREFIX = "secateur_"  # so that no task of the harness is overridden


def write_task(task: LanguageTask, folder: str | Path) -> str:
    """Write `secateur_NAME.yaml` and `secateur_NAME.jsonl`, for `include_path`; nothing in them needs a network.

    A task of choice becomes `multiple_choice` with accuracy, one of generation `generate_until`, greedy and up to the
    end of the line, with exact match; so both ask what `run_task` asks. The YAML holds absolute paths.

    Returns:
        The task's name in the harness.

    Raises:
        OutputError: the folder cannot be written to.
    """
    name, folder = f"{PREFIX}{task.name}", Path(folder).absolute()
    questions = folder / f"{name}.jsonl"
    files = {"data_files": {"test": str(questions)}, "cache_dir": str(folder / ".cache")}
    document = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **(_choice() if task.how is How.CHOICE else _generation(task)),
    }
    rows = [
        {
            "prompt": task.frame + question.prompt,
            "answer": question.answer,
            "options": list(question.options),
            "gold": question.options.index(question.answer) if question.options else 0,
        }
        for question in task.questions
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the task '{name}' to '{folder}': {error.strerror}") from error
    return name


def _choice() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _generation(task: LanguageTask) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [END], "max_gen_toks": task.sampling.limit, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
