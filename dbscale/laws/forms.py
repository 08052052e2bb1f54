"""The laws by name. To add one: write its `Form` in one of the `forms_*` files and list it here."""

from __future__ import annotations

from dbscale.errors import LawError, nearest
from dbscale.laws.form import Form
from dbscale.laws.forms_curves import BNSL, LOG_LAW, RECTIFIED, SATURATING
from dbscale.laws.forms_m4 import M4, m4_product_form
from dbscale.laws.forms_power import (
    CHINCHILLA,
    EFFECTIVE_DATA,
    POWER,
    POWER_PLUS,
    TRANSFER_GAP,
    additive_form,
    product_form,
)
from dbscale.laws.forms_scaling import APPLE_DISTILLATION, APPLE_SUPERVISED, DATA_CONSTRAINED

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        additive_form(),
        product_form(),
        m4_product_form(),
        TRANSFER_GAP,
        EFFECTIVE_DATA,
        POWER,
        POWER_PLUS,
        SATURATING,
        M4,
        BNSL,
        RECTIFIED,
        LOG_LAW,
        CHINCHILLA,
        DATA_CONSTRAINED,
        APPLE_SUPERVISED,
        APPLE_DISTILLATION,
    )
}


def find_form(form: str | Form, variables: tuple[str, ...] | None = None) -> Form:
    """A form by name (or as it is), over fewer variables where it allows that. Raises LawError with the nearest
    name.
    """
    if not isinstance(form, Form):
        if form not in FORMS:
            raise LawError(f"unknown law {form!r}; {nearest(str(form), FORMS)}")
        form = FORMS[form]
    if variables is None or set(variables) == set(form.variable_names) or form.restrict is None:
        return form
    return form.restrict(tuple(n for n in form.variable_names if n in variables))
