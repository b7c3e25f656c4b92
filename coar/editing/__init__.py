"""From attributions to an edited model: a goal, the components chosen for it, and what came of it."""

from coar.editing.edits import Edit, edit, welch_t
from coar.editing.goals import EditGoal
from coar.editing.judging import effect_curve, judge_edit
from coar.editing.tasks import TaskResult, fix_errors, forget_class, reach_goal

__all__ = [
    "Edit",
    "EditGoal",
    "TaskResult",
    "edit",
    "effect_curve",
    "fix_errors",
    "forget_class",
    "judge_edit",
    "reach_goal",
    "welch_t",
]
