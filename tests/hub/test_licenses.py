"""What is said about a licence before publishing."""

from typing import Any

import pytest

from factory.errors import LicenseError
from factory.hub.source_card import check_license, forbids_sharing, remark
from tests.builders.builds import a_source


@pytest.mark.parametrize("license_id", ["cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"])
def test_a_licence_without_derivatives_is_refused_unless_accepted(license_id: str) -> None:
    source = a_source(license=license_id)
    with pytest.raises(LicenseError, match=f"{license_id}, forbids sharing") as caught:
        check_license(source, accepted=False)
    assert "`accept_license`" in caught.value.hint
    check_license(source, accepted=True)


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"license": name}
            for name in ("CC-BY-ND-4.0", " cc-by-nd-4.0 ", "CC BY-NC-ND 4.0", "cc_by_nd_4.0", "(cc.by.nd)")
        ),
        *(
            {"license": name}
            for name in (
                "CC\u2010BY\u2011ND 4.0",
                "cc\u2013by\u2014nc\u2015nd",
                "CCBYND",
                "ccby-ncnd 4.0",
                "CC/BY/ND",
            )
        ),
        *({"license": name} for name in ("cc-by-nd4.0", "cc-by-nc-nd-3.0-igo")),
        {"license": "other", "license_name": "CC-BY-ND-4.0"},
        {"license": "other", "license_name": "Creative Commons Attribution-NoDerivs"},
        {"license": "other", "license_link": "https://creativecommons.org/licenses/by-nc-nd/4.0/"},
        {"license": None, "license_name": "cc-by-nd-4.0"},
        {"license": "apache-2.0 OR cc-by-nd-4.0"},
    ],
)
def test_a_licence_is_known_however_it_is_spelled(fields: dict[str, Any]) -> None:
    assert forbids_sharing(a_source(**fields))


@pytest.mark.parametrize(
    "licenses", [("mit", "CC-BY-ND-4.0"), ("cc-by-nc-nd-3.0", "other"), ("cc-by-nd-2.0",)]
)
def test_of_several_licences_one_that_forbids_is_enough(licenses: tuple[str, ...]) -> None:
    with pytest.raises(LicenseError, match=r"nd-\d\.0, forbids sharing"):
        check_license(a_source(license=licenses), accepted=False)


def test_of_several_licences_the_one_with_conditions_is_told() -> None:
    assert "cc-by-nc-4.0, allows no commercial use" in str(remark(a_source(license=("mit", "cc-by-nc-4.0"))))
    assert "its own terms" in str(remark(a_source(license=("mit", "other"))))
    assert remark(a_source(license=("mit", "unknown"))) is None
    assert "names no licence" in str(remark(a_source(license=("unknown", ""))))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"license": None}, "names no licence"),
        ({"license": "Unknown"}, "names no licence"),
        ({"license": ""}, "names no licence"),
        ({"license": "other"}, "its own terms (not named on its card)"),
        (
            {"license": "other", "license_name": "own-1", "license_link": "LICENSE"},
            "its own terms (own-1 LICENSE)",
        ),
        ({"license": "cc-by-nc-4.0"}, "cc-by-nc-4.0, allows no commercial use"),
        ({"license": "cc-by-nc-sa-2.0"}, "allows no commercial use"),
        ({"license": "apple-amlr"}, "allows no commercial use"),
        ({"license": "fair-noncommercial-research-license"}, "allows no commercial use"),
        ({"license": None, "license_name": "own-1"}, "its own terms (own-1)"),
    ],
)
def test_a_licence_with_conditions_is_told_and_not_refused(fields: dict[str, Any], words: str) -> None:
    source = a_source(**fields)
    told = remark(source)
    assert told
    assert words in told
    assert "mistralai/Mistral-7B-v0.1" in told
    check_license(source, accepted=False)


@pytest.mark.parametrize(
    "license_id",
    ["apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-3.0", "cc0-1.0", "llama2", "cc-by-ndebele", "ccby", "许可"],
)
def test_of_other_licences_nothing_is_said(license_id: str) -> None:
    source = a_source(license=license_id)
    assert remark(source) is None
    assert not forbids_sharing(source)
