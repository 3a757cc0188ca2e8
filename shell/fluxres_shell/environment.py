"""What a task finds around it: its environment variables, and templates of file names filled in.

The variables are those of flux-environment(7). Templates are flux-run(1)'s "mustache" ones: `{{id}}` and
`{{jobid}}` (F58; `{{id.dec}}`, `{{id.hex}}`, `{{id.dothex}}`, `{{id.f58}}`, `{{id.f58plain}}`), `{{name}}`,
`{{nnodes}}`, `{{size}}`, `{{tmpdir}}`, `{{node.id}}`, `{{node.name}}`, and for the task `{{taskid}}`,
`{{task.id}}`, `{{task.rank}}`, `{{task.index}}`, `{{task.localid}}`. What is not known stays as it is.
"""

from __future__ import annotations

import os
from typing import Final

from fluxres.base import jobid
from fluxres_shell.spec import ShellSpec, TaskSpec

NONCE_VARIABLE: Final = "FLUXRES_JOB_NONCE"
"""With FLUX_JOB_ID, marks every process of a job, to be found by when its shell is dead."""
_OPEN: Final = "{{"
_CLOSE: Final = "}}"


def task_env(spec: ShellSpec, task: TaskSpec, tmpdir: str) -> dict[str, str]:
    """The environment of one task: the job's own, and Flux's variables over it."""
    return spec.env | {
        "FLUX_JOB_ID": jobid.f58(spec.id, ascii=True),
        "FLUX_JOB_SIZE": str(spec.ntasks_total),
        "FLUX_JOB_NNODES": str(spec.nnodes),
        "FLUX_JOB_TMPDIR": tmpdir,
        "FLUX_TASK_RANK": str(task.rank),
        "FLUX_TASK_LOCAL_ID": str(task.local),
        "FLUX_KVS_NAMESPACE": spec.namespace,
        "FLUXRES_URI": spec.uri,
        NONCE_VARIABLE: spec.nonce,
    }


def render(template: str, spec: ShellSpec, task: TaskSpec, tmpdir: str) -> str:
    """`template` with every known `{{name}}` in it replaced."""
    if _OPEN not in template:
        return template
    values = _values(spec, task, tmpdir)
    head, *rest = template.split(_OPEN)
    parts = [head]
    for piece in rest:
        name, closed, tail = piece.partition(_CLOSE)
        value = values.get(name.strip()) if closed else None
        parts.append(_OPEN + piece if value is None else value + tail)
    return "".join(parts)


def per_task(template: str) -> bool:
    """Whether each task has a file of its own under this template."""
    return "{{task" in template.replace(" ", "")


def _values(spec: ShellSpec, task: TaskSpec, tmpdir: str) -> dict[str, str]:
    ids = {
        "f58": jobid.f58(spec.id),
        "f58plain": jobid.f58(spec.id, ascii=True),
        "dec": str(spec.id),
        "hex": hex(spec.id),
        "dothex": jobid.dothex(spec.id),
    }
    values = {f"{word}.{form}": text for word in ("id", "jobid") for form, text in ids.items()}
    # The plain form here: a file name with ƒ in it is of no use in a locale without it.
    values |= {"id": ids["f58plain"], "jobid": ids["f58plain"]}
    values |= {
        "name": spec.name,
        "nnodes": str(spec.nnodes),
        "size": str(spec.ntasks_total),
        "tmpdir": tmpdir,
    }
    values |= {"node.id": str(spec.ranks.index(spec.rank)), "node.name": os.uname().nodename}
    values |= dict.fromkeys(("taskid", "task.id", "task.rank"), str(task.rank))
    return values | dict.fromkeys(("task.index", "task.localid"), str(task.local))
