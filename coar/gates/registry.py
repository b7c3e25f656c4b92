"""All kinds of gates, and the choice of one for each site."""

from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest, sites_of
from coar.gates.edges import EDGE_GATES
from coar.gates.experts import EXPERT_GATES
from coar.gates.gate import Gate
from coar.gates.hook import HOOK_GATES
from coar.gates.positions import POSITION_GATES
from coar.gates.resample import RESAMPLE_GATES
from coar.gates.slices import SLICE_GATES
from coar.gates.weight import WEIGHT_GATES

GATE_KINDS: tuple[GateKind, ...] = (  # the first that accepts a site gates it
    SLICE_GATES,
    EDGE_GATES,
    EXPERT_GATES,
    RESAMPLE_GATES,
    POSITION_GATES,
    WEIGHT_GATES,
    HOOK_GATES,
)


def build_gates(request: GateRequest) -> list[Gate]:
    """Build the gates of all components, each site by the first kind that accepts it.

    Raises:
        AblationError: When components overlap or cannot be gated as requested.
    """
    accepted: list[list[GatedSite]] = [[] for _ in GATE_KINDS]
    for gated in sites_of(request.components):
        number = next((i for i, kind in enumerate(GATE_KINDS) if kind.accepts(request, gated)), None)
        if number is None:
            raise AblationError(f"no kind of gate applies to the components at {gated.site!r}; exclude them")
        accepted[number].append(gated)
    return [gate for kind, sites in zip(GATE_KINDS, accepted, strict=True) for gate in kind.build(request, sites)]
