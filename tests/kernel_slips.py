"""Plausible slips in the CUDA kernels, each with the check that has to notice it."""

SLIPS = {
    ("outer_product.cu", "check_outer"): {
        "wait for one group too few": ("wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
        "no barrier before the oldest stage is filled": (
            "    __syncthreads();\n    copy_slice",
            "    copy_slice",
        ),
        "fill the stage that is being read": ("copy_slice(next_filled,", "copy_slice(stage,"),
        "fragments added to, not toggled": ("(b ^ i * 32)", "(b + i * 32)"),
        "a swizzle that meets in one bank": ("(chunk ^ (token & 7))", "(chunk ^ (token & 3))"),
        "one token of the next sample": (
            "token < slice.end - slice.token",
            "token <= slice.end - slice.token",
        ),
        "token steps swizzled alike at a wrong distance": (
            "panel + plan.to + token * kCols * 2",
            "panel + plan.to + token * kCols",
        ),
        "sample ends one token early": ("(offsets[walk.sample + 1])", "(offsets[walk.sample + 1] - 1)"),
        "copies take one slice too many": ("walk.token >= walk.end", "walk.token > walk.end"),
        "products take one slice too many": (
            "computing.token < computing.end",
            "computing.token <= computing.end",
        ),
        "next sample starts from this one's tile": ("    clear(acc);\n    computing", "    computing"),
        "left fragment by the right one's layout": ("at.lane % 8 + at.lane / 16 * 8", "at.lane % 16"),
        "warps share a slot": (" * kWarps + at.warp;", " * kWarps;"),
    },
    ("outer_product.cuh", "check_outer"): {
        "last group of tile rows": ("inside % rows", "inside % kGroup"),
        "lanes joined incompletely": ("int distance = 8; distance", "int distance = 4; distance"),
    },
    ("outer_product.cu", "check_outer_masks"): {
        "row mask": ("at.row(i, e) < q.num_b_cols", "at.row(i, e) <= q.num_b_cols"),
        "column mask": ("at.col(j, e) < q.num_a_cols", "at.col(j, e) <= q.num_a_cols"),
    },
    ("outer_product.cuh", "check_outer_nonfinite"): {
        "NaN dropped": ("mine.high = larger(mine.high, x)", "mine.high = fmaxf(mine.high, x)"),
        "never recounted": ("if (!is_finite(all.sumsq) ||", "if ("),
    },
    ("outer_product.cuh", "check_outer_scales"): {
        "small squares lost": ("largest < 1e-15f", "largest < 0.0f"),
    },
    ("outer_product.cu", "check_total"): {
        "weights ignored": ("fmaf(weight, ", "fmaf(1.0f, "),
        "total overwritten": ("+ at.col(j, e)] += x", "+ at.col(j, e)] = x"),
    },
    ("outer_product_sm90.cu", "check_outer"): {
        "copies do not wait for the stage": ("    wait_for_phase(stage.empty(), stage.parity ^ 1);\n", ""),
        "copies wait for the wrong parity": (
            "stage.empty(), stage.parity ^ 1",
            "stage.empty(), stage.parity",
        ),
        "bytes of one box missing": (
            "arrive_and_expect(stage.full(), Config<kTotal>::kStageBytes)",
            "arrive_and_expect(stage.full(), Config<kTotal>::kStageBytes - kBox)",
        ),
        "products do not wait for full slices": (
            "    wait_for_phase(stage.full(), stage.parity);\n    multiply_steps",
            "    multiply_steps",
        ),
        "products do not wait for cleared rows": (
            "    if (ends_within_a_step(rows)) wait_for_phase(stage.cleared(), stage.parity);\n",
            "",
        ),
        "rows are cleared before they have arrived": (
            "    wait_for_phase(stage.full(), stage.parity);\n    if (ends_within_a_step(rows)) {",
            "    if (ends_within_a_step(rows)) {",
        ),
        "rows are not cleared": ("if (ends_within_a_step(rows)) {", "if (false) {"),
        "one row too few is cleared": (
            "(kStep - rows % kStep) * kTokenBytes",
            "(kStep - 1 - rows % kStep) * kTokenBytes",
        ),
        "cleared rows are not published": ("      publish_stores();\n", ""),
        "lanes do not wait for each other's stores": ("      synchronize_warp();\n", ""),
        "clearing does not count towards an empty stage": (
            "      arrive(stage.empty());\n    }\n",
            "    }\n",
        ),
        "a stage is released with its products under way": (
            "wait_for_products<1>()",
            "wait_for_products<2>()",
        ),
        "the tile is read with its products under way": ("wait_for_products<0>()", "wait_for_products<1>()"),
        "the last full slice is never released": (
            "  pin(acc);\n  if (token > begin && lane == 0) arrive(previous);\n",
            "  pin(acc);\n",
        ),
        "the last slice is never released": ("  if (lane == 0) arrive(stage.empty());\n", ""),
        "groups of 8 tokens at a wrong distance": ("(kSwizzlePeriod / 16) << 32", "(kBox / 16) << 32"),
        "boxes at a wrong distance": ("(kBox / 16) << 16", "(kSwizzlePeriod / 16) << 16"),
        "operands not swizzled": ("kSwizzle128 = 1ull << 62", "kSwizzle128 = 0ull << 62"),
        "ring not on the swizzle's period": (
            "(shared_address(memory) + kSwizzlePeriod - 1) / kSwizzlePeriod * kSwizzlePeriod",
            "shared_address(memory)",
        ),
        "a stage more than there is room for": ("if (++index < Config", "if (++index <= Config"),
        "parity never turns": ("    parity ^= 1;\n", ""),
        "steps at a wrong distance": (
            "left + k * kStep * kTokenBytes / 16",
            "left + k * kStep * kTokenBytes / 8",
        ),
        "next sample starts from this one's tile": ("add || k > 0", "true"),
        "a step of the next sample": ("rows > 2 * kStep", "rows > kStep / 2"),
        "second warpgroup takes the first one's rows": ("stage.box(warpgroup)", "stage.box(0)"),
        "warps share a slot": (" * kMultiplyingWarps + warp;", " * kMultiplyingWarps;"),
    },
    ("outer_product_sm90.cu", "check_outer_masks"): {
        "row mask on Hopper": ("at.row_of(i) < q.num_b_cols", "at.row_of(i) <= q.num_b_cols"),
        "column mask on Hopper": ("at.col_of(i) < q.num_a_cols", "at.col_of(i) <= q.num_a_cols"),
    },
    ("outer_product_sm90.cu", "check_outer_nonfinite"): {
        "rows are cleared on the left alone": (
            "box < Config<kTotal>::kBoxes;",
            "box < Config<kTotal>::kBoxesM;",
        ),
        "rows are cleared on the right alone": ("int box = 0;", "int box = Config<kTotal>::kBoxesM;"),
    },
    ("outer_product_sm90.cu", "check_total"): {
        "weights ignored on Hopper": ("fmaf(weight, ", "fmaf(1.0f, "),
    },
    ("statistics.cuh", "check_outer"): {
        "tree stops early": ("half > 0", "half > 1"),
        "no barrier in the tree": ("+ half]);\n    __syncthreads();", "+ half]);"),
    },
    ("statistics.cu", "check_outer"): {
        "empty sample takes what lies there": ("if (has_rows)", ""),
        "sum has a row of the next sample": ("row < q.offsets[sample + 1]", "row <= q.offsets[sample + 1]"),
    },
    ("rows.cu", "check_embedding"): {
        "run ends early": ("place < end", "place + 1 < end"),
        "order ignored": ("q.order ? q.order[place] : place", "place"),
        "padding counted": (
            "q.run_offsets[q.num_samples]) return",
            "q.run_offsets[q.num_samples] + 1) return",
        ),
    },
    ("rows.cu", "check_vectors"): {
        "lanes overlap": ("row += kSumLanes", "row += kSumLanes - 1"),
        "no barrier before lanes are added": ("  __syncthreads();\n  Partial mine", "  Partial mine"),
        "normalised input not rounded": (
            "rounded<Input>((x[i] - mean) * rstd)",
            "(x[i] - mean) * rstd",
        ),
        "mean ignored": ("(x[i] - mean) * rstd", "x[i] * rstd"),
    },
    ("head.cu", "check_softmax"): {
        "sum not carried over to the new largest": ("p.sum * expf(p.high - high)", "p.sum"),
        "elements past the row": ("i < count ? expf(x[i] - four.high) : 0.0f", "expf(x[i] - four.high)"),
        "one-hot beside the target": ("col + i == target ?", "col + i == target + 1 ?"),
        "loss by the wrong sign": ("logf(all.sum) - (target_logit", "logf(all.sum) + (target_logit"),
        "squares before the one-hot": ("static_cast<double>(d[i]) * d[i]", "static_cast<double>(d[i])"),
    },
    ("head.cu", "check_column_bounds"): {
        "bounds without underflow": ("lost = terms * 1.1754944e-38f", "lost = 0.0f"),
        "bounds rounded down": ("upwards = 1.0f +", "upwards = 1.0f -"),
        "signs cancel": ("fabsf(d[i])", "d[i]"),
    },
}
"""(file, check): {name: (what the source says, what it might have said)}."""
