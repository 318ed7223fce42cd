"""Cycles of a schedule: bundles times the loops around them."""

import schedule

TEXT = """= control target key start
LB: loop body
= control target key end
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sphi %s1 }
   0x2   : > { %p9_p0 = scmp.ne.s32.totalorder %s2, 0 }
   0x3   : > { %40 = sbr.rel (%p9_p0) target = $region7 }
   0x4 LB: >> { %v1 = vadd.f32 %v2, %v3 }
   0x5   : >> { %p1_p1 = scmp.ge.s32.totalorder %s4, 5 /* loop exit test */ }
   0x6   : > { %41 = sbr.rel (!%p1_p1) target = $region3 }
   0x7 PF: > { %v4 = vmul.f32 %v2, %v3 } /* Start/End empty region 7 */
   0x8   : > { %p2_p2 = scmp.ge.s32.totalorder %s5, 10 /* loop exit test */ }
   0x9   :  { %42 = sbr.rel (!%p2_p2) target = $region1 }
   0xa   :  { %43 = sfence }
"""


def test_loops_are_counted():
    assert schedule.cycles(TEXT) == 1 + 10 * (3 + 5 * 3 + 3) + 1


def test_programs_of_a_kernel_are_its_grid_and_first_steps_come_once():
    seldom, always = 5 * 3, 3 + 3
    assert schedule.cycles(TEXT, 2, 4) == 1 + 8 * always + 2 * seldom + 1


def test_files_are_read_by_name(tmp_path):
    (tmp_path / "17-fusion.3-00-schedule-analysis_final_bundles.txt").write_text("0 : { x }")
    (tmp_path / "17-fusion.3-01-final_bundles.txt").write_text(TEXT)
    (tmp_path / "18-forward_kernel_2x4.1-01-final_bundles.txt").write_text(TEXT)
    found = schedule.read(tmp_path)
    assert found == {"fusion.3": schedule.cycles(TEXT), "forward_kernel_2x4.1": schedule.cycles(TEXT, 2, 4)}
