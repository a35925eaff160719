"""What a user may set: checked once, at start-up, the same in every process; and per request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.budgets.auto import AutoBudget
from vllm_kvevict.budgets.curve import Calibration
from vllm_kvevict.eviction.building import build_method, policy_named
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.smallest import check_holds
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.foreign.values import quoted
from vllm_kvevict.options import reading
from vllm_kvevict.options.errors import one_sentence
from vllm_kvevict.options.limits import Budget, Fraction, RequestOptions
from vllm_kvevict.options.names import (
    ALL,
    ALLOCATOR,
    AUTO,
    BUDGET,
    BUDGET_CALIBRATION,
    BUDGET_MAX,
    BUDGET_MIN,
    DURING_DECODE,
    DURING_PREFILL,
    INTERVAL,
    LIMITS,
    LOG_REQUESTS,
    MAX_NUM_SEQS,
    NONE,
    POLICY,
    PROTECT_MULTIMODAL,
    checked_name,
    checked_switch,
)
from vllm_kvevict.options.renamed import PolicyOptions
from vllm_kvevict.options.table import Option, check_names, options_of_requests
from vllm_kvevict.policies import POLICIES

__all__ = ["AUTO", "EvictionConfig"]

_FRACTION = "a fraction between 0 and 1"
_TOKENS = "a whole number of tokens of at least 0"
_SWITCH = "true or false"
_LIMITS = {ALL: RequestOptions(), NONE: RequestOptions(options=[])}


class EvictionConfig(BaseModel):
    """How the prompts of a server are evicted. Travels as JSON in ``additional_config["kv_eviction"]``.

    This is the table of options: a field's ``Option`` says what it means, and everything else that users are told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    policy: Annotated[
        str,
        Option(
            "Switch eviction on; the policy that ranks tokens. Without it nothing of vLLM changes. A request that says "
            "none keeps its whole prompt.",
            "the name of a policy",
            name=POLICY,
            is_flag=True,
            in_request=True,
            metavar="POLICY",
            page="policies.md#policies",
            registry=POLICIES,
        ),
    ]
    budget: Annotated[
        Budget | Literal["auto"],
        Option(
            "Tokens per KV head and layer that a prompt keeps, or the fraction of it; rounded up to whole blocks, of "
            "which the last one is filled as far as the prompt fills it. Or auto: as much of each prompt as a "
            "calibration says.",
            "a whole number of tokens of at least 1, a fraction between 0 and 1, or 'auto'",
            name=BUDGET,
            is_flag=True,
            in_request=True,
            metavar="N",
            read=reading.budget,
        ),
    ]
    calibration: Annotated[
        dict[str, Calibration],
        Option(
            "What `kvevict calibrate` has written, for a budget of auto: constants of each policy on this model.",
            "for each policy the numbers alpha and beta",
            name=BUDGET_CALIBRATION,
            is_flag=True,
            metavar="FILE",
            read=reading.calibration,
        ),
    ] = {}
    budget_target: Annotated[
        Fraction,
        Option(
            "Quality that auto shall leave: log-likelihood of the answer with all of the prompt over the one with what "
            "is kept.",
            _FRACTION,
        ),
    ] = 0.95
    budget_min: Annotated[
        Fraction,
        Option("The smallest fraction of a prompt that auto keeps.", _FRACTION, name=BUDGET_MIN, in_request=True),
    ] = 0.05
    budget_max: Annotated[
        Fraction,
        Option("The largest fraction of a prompt that auto keeps.", _FRACTION, name=BUDGET_MAX, in_request=True),
    ] = 0.95
    allocator: Annotated[
        str | None,
        Option(
            "How the budget is shared among layers and heads.",
            "the name of an allocator",
            name=ALLOCATOR,
            is_flag=True,
            in_request=True,
            metavar="NAME",
            default="the policy's own",
            page="policies.md#allocators",
            registry=ALLOCATORS,
        ),
    ] = None
    num_sink: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Option("First tokens of the prompt that always stay.", _TOKENS, default="the policy's own"),
    ] = None
    num_recent: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Option("Last tokens of the prompt that always stay.", _TOKENS, default="the policy's own"),
    ] = None
    protect_multimodal: Annotated[
        bool,
        Option(
            "Tokens of images, audio and video always stay. A prompt that has more of them than its budget holds is "
            "refused; a fraction is raised to them.",
            _SWITCH,
            name=PROTECT_MULTIMODAL,
            is_flag=True,
            in_request=True,
        ),
    ] = False
    policy_options: Annotated[
        PolicyOptions, Option("Parameters of the policy, such as window.", "a mapping of names to values")
    ] = {}
    allocator_options: Annotated[
        dict[str, Any], Option("Parameters of the allocator, such as alpha.", "a mapping of names to values")
    ] = {}
    during_decode: Annotated[
        bool | None,
        Option(
            "Go on while an answer grows, so that a request never holds more than its budget; or not, for a policy "
            "that would.",
            _SWITCH,
            name=DURING_DECODE,
            is_flag=True,
            in_request=True,
            default="the policy's own: true for morphkv",
        ),
    ] = None
    during_prefill: Annotated[
        bool,
        Option(
            "Evict after each chunk of a prompt, so that it needs the memory of its budget and of a chunk only, and "
            "prompts are served that do not fit into the KV cache.",
            _SWITCH,
            name=DURING_PREFILL,
            is_flag=True,
            in_request=True,
        ),
    ] = False
    interval: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Option(
            "Tokens of an answer from one eviction to the next: 1, so that each new token takes the slot of one that "
            "goes, or the size of a block.",
            "1 or the size of a block, in tokens",
            name=INTERVAL,
            is_flag=True,
            in_request=True,
            metavar="N",
            default="the size of a block",
            read=int,
        ),
    ] = None
    max_num_seqs: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Option(
            "Reserve memory for requests that are evicted during decode, between chunks or deferred, which they may "
            "choose then: so many at once, the next one waits. Not needed if the server's own options evict so.",
            "a whole number of at least 0",
            name=MAX_NUM_SEQS,
            is_flag=True,
            metavar="N",
            default="0; if the server's own options evict so, --max-num-seqs, as far as 1 % of the KV cache goes",
            read=int,
        ),
    ] = None
    scoring_scratch_mib: Annotated[
        int,
        Field(ge=1),
        Option("MiB left free beside the KV cache for scoring and selection.", "a whole number of MiB of at least 1"),
    ] = 256
    log_requests: Annotated[
        bool,
        Option(
            "Write one JSON line to the log for every prompt that is evicted: tokens, blocks, milliseconds.",
            _SWITCH,
            name=LOG_REQUESTS,
            is_flag=True,
        ),
    ] = False
    request_options: Annotated[
        Literal["all", "none"] | RequestOptions,
        Option(
            "What requests may choose in vllm_xargs: all, none, or limits, as a YAML or JSON file or a JSON text: "
            "options and policies, each a list of names; least_budget and most_budget, in tokens or as a fraction. "
            "Presses of kvpress have to be listed.",
            "'all', 'none', or a mapping of options, policies, least_budget and most_budget",
            name=LIMITS,
            is_flag=True,
            metavar="all|none|FILE-or-JSON",
            page="operations.md#limit-requests",
            read=reading.request_options,
        ),
    ] = "all"

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        POLICIES.get(name)
        return name

    @field_validator("allocator")
    @classmethod
    def _known_allocator(cls, name: str | None) -> str | None:
        if name is not None:
            ALLOCATORS.get(name)
        return name

    @field_validator("request_options", mode="before")
    @classmethod
    def _known_limits(cls, value: object) -> object:
        return RequestOptions.parse(value, options_of_requests(cls)) if isinstance(value, Mapping) else value

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> EvictionConfig:
        """Return the config in ``values`` (plain JSON).

        Raises ValueError, one sentence that names the field, what was given and what is allowed.
        """
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            raise ValueError(one_sentence(cls, error)) from None
        config.method()
        config.auto_budget()
        config._import_choices()
        return config

    def _import_choices(self) -> None:
        """Import what requests may choose now, so that no request makes the others wait for it."""
        for name in self.limits.named_policies:
            policy_named(name, {})
        if self.limits.allows(POLICY) and ALL in self.limits.allowed_policies:
            POLICIES.import_all()
        if self.limits.allows(ALLOCATOR):
            ALLOCATORS.import_all()

    @property
    def limits(self) -> RequestOptions:
        """What requests may choose."""
        return _LIMITS[self.request_options] if isinstance(self.request_options, str) else self.request_options

    @property
    def most_kept(self) -> int | float:
        """What a prompt keeps at most: tokens, or the fraction of it."""
        return self.budget_max if isinstance(self.budget, str) else self.budget

    def auto_budget(self) -> AutoBudget | None:
        """Return how the budget of each prompt is chosen, None if it is fixed.

        Raises ValueError if that is not known of the policy, or does not go with what else was asked for.
        """
        if self.budget != AUTO:
            return None
        method = self.method()
        if self.policy not in self.calibration:
            known = ", ".join(sorted(self.calibration)) or "none"
            raise ValueError(
                f"kv_budget: 'auto' needs a calibration of policy {self.policy!r} (given: {known}); make one with "
                f"`kvevict calibrate` and name its file with --kv-budget-calibration"
            )
        if method.schedule.is_bounded:
            option = DURING_DECODE if method.schedule.evicts_answer else DURING_PREFILL
            raise ValueError(
                f"kv_budget: 'auto' is chosen when all of a prompt is known, and does not go with {option}; give a "
                f"number, or say {option} false"
            )
        if self.budget_min > self.budget_max:
            raise ValueError(
                f"kv_budget_min: expected at most kv_budget_max ({self.budget_max}), got {self.budget_min}"
            )
        fitted = self.calibration[self.policy]
        return AutoBudget(fitted, self.budget_target, self.budget_min, self.budget_max, method.min_tokens)

    def method(self) -> Method:
        """Return the policy, the allocator and the protection this config names.

        Raises ValueError for an option that the policy or the allocator does not take.
        """
        return build_method(
            self.policy,
            self.policy_options,
            self.allocator,
            self.allocator_options,
            num_sink=self.num_sink,
            num_recent=self.num_recent,
            during_decode=self.during_decode,
            during_prefill=self.during_prefill,
            interval=self.interval,
        )

    @property
    def allocator_name(self) -> str:
        """The allocator in use."""
        return self.allocator or traits_of(self.method().policy).default_allocator

    def check_block_size(self, block_size: int) -> None:
        """Raise ValueError if the budget cannot hold the tokens that must stay in blocks of ``block_size``."""
        if self.interval not in (None, 1, block_size):
            raise ValueError(
                f"{INTERVAL}: expected 1 or the size of a block ({block_size}), got {quoted(self.interval)}"
            )
        check_holds(self.budget, self.policy, self.method(), block_size)

    def for_request(self, options: Mapping[str, Any] | None, block_size: int) -> EvictionConfig | None:
        """Return the config of one request, None if it asked for no eviction.

        options: the request's ``vllm_xargs``, of which those are read that the table of options has for requests.
                 ``kv_eviction`` may be "none" as well. The server's own options of policy and allocator go with its own
                 policy and allocator; others get their defaults

        Raises ValueError that names the field and what is allowed, as well for what the operator does not let requests
        choose and for options that look like ours and are none.
        """
        known = options_of_requests(type(self))
        check_names(options or {}, known, [option for option in known if self.limits.allows(option)])
        given = {option: value for option in known if (value := (options or {}).get(option)) is not None}
        self.limits.check_options(given)
        changes: dict[str, Any] = {}
        for option, value in given.items():
            row = known[option]
            if row.is_switch:
                value = checked_switch(option, value)
            elif row.option.registry is not None:
                expected = row.option.allowed if option != POLICY else f"{NONE!r} or {row.option.allowed}"
                value = checked_name(option, value, expected)
            changes[row.field] = value
        policy = changes.get("policy", self.policy)
        self.limits.check_policy(policy, self.policy)
        if policy in (NONE, self.policy):
            changes.pop("policy", None)
        config = self._with(changes)
        self._check_limits(given, config)
        config.check_block_size(block_size)
        return None if policy == NONE else config

    def _with(self, changes: dict[str, Any]) -> EvictionConfig:
        """Return this config with fields that a request has chosen."""
        if not changes:
            return self
        is_other_policy = changes.get("policy", self.policy) != self.policy
        is_other_allocator = changes.get("allocator", self.allocator_name) != self.allocator_name
        if is_other_policy:
            changes = {"policy_options": {}, **changes}
        # another policy's own allocator may not take the options of this one's
        if is_other_allocator or (is_other_policy and self.allocator is None and "allocator" not in changes):
            changes = {"allocator_options": {}, **changes}
        if is_other_policy or changes.get("during_decode") is False:  # the server's interval is for its own policy
            changes = {"interval": None, **changes}
        return self.parse({**self.model_dump(), **changes})

    def _check_limits(self, given: Mapping[str, Any], config: EvictionConfig) -> None:
        """Raise ValueError for a budget of a request, all of ``config``, beyond what the operator lets it choose."""
        is_chosen = config.budget != self.budget
        if is_chosen:
            self.limits.check_budget(BUDGET, config.budget)
        for option, fraction in ((BUDGET_MIN, config.budget_min), (BUDGET_MAX, config.budget_max)):
            if config.budget == AUTO and (is_chosen or option in given):
                self.limits.check_budget(option, fraction)
