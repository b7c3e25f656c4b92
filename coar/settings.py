"""The base class of settings: frozen, without unknown fields, and validated with this package's errors."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from coar.errors import CoarError, SettingsError
from coar.renamed import refuse_arguments, refuse_members


class Settings(BaseModel):
    """Base of all user settings; a validation error lists every wrong field."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    mistake: ClassVar[type[CoarError]] = SettingsError

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_members(cls)

    def __init__(self, **settings: Any) -> None:
        refuse_arguments(type(self).__name__, settings)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise self.mistake(f"{type(self).__name__} cannot be made: {problems}; correct these settings") from None
