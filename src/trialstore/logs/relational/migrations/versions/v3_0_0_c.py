"""Intermediate values that are infinite or NaN get a type beside a NULL."""

from trialstore.logs.relational.migrations.infinities import add_value_type

revision = "v3.0.0.c"
down_revision = "v3.0.0.b"


def upgrade() -> None:
    add_value_type(
        "trial_intermediate_values",
        "trial_intermediate_value_id",
        "intermediate_value",
        ("FINITE", "INF_POS", "INF_NEG", "NAN"),
        "trialintermediatevaluetype",
    )
