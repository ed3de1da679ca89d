"""Who writes an old keyword reads the new one."""

import pytest

from transformers_resps.trainers.renamed import check_renamed


def test_an_old_keyword_is_refused_with_the_new_one():
    check_renamed("Config", {"ttt_steps": 3}, {"steps": "`ttt_steps`"})
    with pytest.raises(ValueError, match=r"^`Config` has no `steps`\. Write `ttt_steps` instead\.$"):
        check_renamed("Config", {"steps": 3}, {"steps": "`ttt_steps`"})
