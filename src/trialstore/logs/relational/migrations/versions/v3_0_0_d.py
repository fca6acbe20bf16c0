"""Values that are infinite get a type beside a NULL."""

from trialstore.logs.relational.migrations.infinities import add_value_type

revision = "v3.0.0.d"
down_revision = "v3.0.0.c"


def upgrade() -> None:
    add_value_type(
        "trial_values",
        "trial_value_id",
        "value",
        ("FINITE", "INF_POS", "INF_NEG"),
        "trialvaluetype",
    )
