"""The releases of transformers that exported code accepts are those that the package was tried with."""

import transformers

from modeling_deepseek_moe._compat import HIGHEST_TRIED
from modeling_deepseek_moe.transformers_names import NEWEST_TRIED, OLDEST_TRIED, minor_release


def test_the_installed_transformers_is_one_of_those_that_were_tried():
    assert OLDEST_TRIED <= minor_release(transformers.__version__) <= NEWEST_TRIED


def test_exported_code_and_the_package_name_the_same_newest_release():
    assert minor_release(HIGHEST_TRIED["transformers"]) == NEWEST_TRIED
